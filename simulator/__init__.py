"""A cluster in virtual time: the router's own decisions on traces, over workers that take modelled time.

    cost_model   what a step costs, from a file (measured by benchmarks/step_cost.py) or from published hardware figures
    traces       requests from Mooncake, Azure and ServeGen files
    loop         the event loop; network: queues of NICs; prefix_cache: finite caches of the fast workers
    fast         thousands of workers, each advanced from event to event in closed form
    exact        tens of workers, each the real engine core and scheduler, under the real dispatcher and life cycles
    outcome      what a request met, and goodput; report: JSON and HTML; planner: pools and money

docs/simulator.md says what is modelled and what is not.
"""
