"""Load on running servers: when requests come, what they ask, who answers, and how long it took."""
