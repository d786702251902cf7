"""Behind ``dmfast bench``: the fused losses against what else there is, and one training step against a plain one."""
