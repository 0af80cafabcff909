"""The steps of a conversion, in the order in which `pipeline.py` runs them.

1. `find_head`
2. `generate_targets`, for a model with an encoder
3. `held_out`: documents to measure on
4. `hidden_states`
5. `special_tokens`, `place_tokens` (with `partition` and `bisection`): always-on tokens and experts
6. `distill`: the router
7. `pack_router_and_tail`
8. `choose_operating_point`: k and R
9. `fit_combiner`, for `combine: learned`
"""
