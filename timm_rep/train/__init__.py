"""timm's own train.py, unmodified, with the time steps of RepAn around its epochs; and timm's other scripts."""
from .wrapper import main

__all__ = ['main']
