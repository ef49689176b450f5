"""How many workers each pool should have: one pure function for the live cluster and the simulator.

    observation   what is seen of both pools, at one moment
    demand        the work that comes, in workers: of prompts, of answers; now and after a given time
    decision      what to do, the numbers that led to it, what else was weighed
    policy        decide(): the choice of one pair (prefill, decode) within a budget
    config        the `scaling:` section of the cluster configuration

docs/elasticity.md has the rules in words.
"""
