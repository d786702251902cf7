"""Run ``dmfast bench``: compare the fused losses with other ones, and one training step with a plain one."""
