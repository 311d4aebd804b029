"""Chaos: a real balancer process before lab replicas that are killed, stopped, cut and confused, under steady load.

`python -m tests.chaos --steps 1000 --seed 7` plays that many seeded faults and looks, after each, whether every promise
of the balancer held: from what the clients got, from what the replicas saw, and from what the balancer says.
"""
