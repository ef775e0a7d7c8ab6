"""Layer 3: objectives as functions of tensors. No networks, no optimisers."""
