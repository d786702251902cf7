"""Connect dmfast to other frameworks and to loggers. ``import dmfast`` imports none of these modules."""
