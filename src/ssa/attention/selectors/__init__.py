"""The selectors: each says how blocks are chosen, and what is kept of a cache's tokens for that."""

from ssa.attention.selectors.selector import HeadShape, Selector

__all__ = ["HeadShape", "Selector"]
