"""Chaos tests: a balancer process under steady load, before lab replicas that are killed, stopped, cut and confused.

`python -m tests.chaos --steps 1000 --seed 7` plays that many seeded faults. After each it checks that every promise of
the balancer held, by what the clients got, what the replicas saw, and what the balancer reports.
"""
