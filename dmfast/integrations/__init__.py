"""Bridges to other frameworks and to loggers. Each module imports its own; ``import dmfast`` imports none of them."""
