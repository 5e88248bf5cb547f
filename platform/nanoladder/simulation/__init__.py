"""A sweep on a fleet that does not exist yet: how long, how full, what failures and slow devices take, what it costs.

`phases` says what runs when (by the real pool, sampler and ladder), `jobs` how long each takes, `engine` lets time pass,
`summary` and `figure` show it.
"""
