"""A teacher with everything in closed form: data N(mu, s^2), independent per element.

RF, x_t = (1-t) x0 + t eps: mean m = (1-t) mu, variance A^2 = (1-t)^2 s^2 + t^2, z = x - m. By
Gaussian conditioning
    E[x0 | x] = mu + (1-t) s^2 z / A^2,   E[eps | x] = t z / A^2,   V = E[eps | x] - E[x0 | x],
and the probability-flow ODE keeps z / A, hence the consistency map f = mu + s z / A. TrigFlow: the
same with (cos, sin) for (1-t, t).

Times must broadcast against x already (use `rcm.diffusion.time.per_frame` for [B, 1]). Nothing here
calls the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearGaussian:
    mu: float = 0.7
    s: float = 0.4

    def _standard(self, x, a, b):
        """z and A for x = a x0 + b eps."""
        return x - a * self.mu, torch.sqrt(a**2 * self.s**2 + b**2)

    def _posterior(self, x, a, b):
        z, big_a = self._standard(x, a, b)
        return self.mu + a * self.s**2 * z / big_a**2, b * z / big_a**2

    def rf_velocity(self, x, t):
        x0, eps = self._posterior(x, 1 - t, t)
        return eps - x0

    def rf_consistency(self, x, t):
        z, big_a = self._standard(x, 1 - t, t)
        return self.mu + self.s * z / big_a

    def rf_student(self, x, t):
        """The velocity whose x - t v is the consistency map (t > 0)."""
        return (x - self.rf_consistency(x, t)) / t

    def rf_flow_map(self, x, t, s):
        """Where the probability-flow ODE through x at t is at s."""
        z, big_a = self._standard(x, 1 - t, t)
        _, at_s = self._standard(x, 1 - s, s)
        return (1 - s) * self.mu + at_s * z / big_a

    def rf_mean_velocity(self, x, t, s):
        """The u whose x - (t - s) u is the flow map; the velocity where s = t."""
        equal = s == t
        span = torch.where(equal, torch.ones_like(t), t - s)
        return torch.where(equal, self.rf_velocity(x, t), (x - self.rf_flow_map(x, t, s)) / span)

    def trig_velocity(self, x, tau):
        x0, eps = self._posterior(x, torch.cos(tau), torch.sin(tau))
        return torch.cos(tau) * eps - torch.sin(tau) * x0

    def trig_consistency(self, x, tau):
        z, big_a = self._standard(x, torch.cos(tau), torch.sin(tau))
        return self.mu + self.s * z / big_a

    def trig_student(self, x, tau):
        """The F whose cos x - sin F is the consistency map (tau > 0)."""
        return (torch.cos(tau) * x - self.trig_consistency(x, tau)) / torch.sin(tau)
