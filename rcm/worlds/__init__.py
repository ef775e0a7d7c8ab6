"""The toy world: videos, codec, captions and scores, trained on two CPU cores."""
