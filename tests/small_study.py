"""Settings of a small study of the demo's models."""

import jaxmech as jm
from jaxmech.study import EDGES, Settings

SETTINGS = Settings(  # none of the numbers is the default, so that one that is not handed on shows
    base=jm.demo.path("base"),
    tuned=(jm.demo.path("tuned"),),
    chain=jm.read_chain(jm.demo.path("chain.toml"))[:3],
    k={"value_fetcher": 10},
    min_effect=2e-3,
    threshold=0.02,
    lam=0.02,
    epochs=3,
    seed=2,
    scenes=8,
    contexts=20,
    random_circuits=2,
    random_subsets=3,
    train=48,
    validation=8,
    test=8,
    dcm_batch=8,
    variants=False,
    repeats=2,
    patched=8,
    components=("z", "q+k+v"),
    single_head_prompts=24,
    edges=EDGES[:3],
)
