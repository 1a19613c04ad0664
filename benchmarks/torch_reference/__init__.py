"""The methods in PyTorch, on Hugging Face's `LlamaForCausalLM`: oracle of the tests and baseline of the timings.

Written from the definitions in Prakash et al. 2024 (arXiv:2402.14811), Wang et al. 2022 (arXiv:2211.00593) and Davies
et al. 2023 (arXiv:2307.03637); it shares no code with jaxmech. Everything but `incremental` is what a careful user of
forward hooks writes: batched over examples, no Python loop over examples, patched activations stay on the device, no
attention computed only to be thrown away, logits only where they are read.

  hooks.py          capture and edit activations of a model
  path_patching.py  one forward pass per sender head and stream
  circuits.py       mean-ablated circuit evaluation
  dcm.py            one training step of a mask over heads
  cmap.py           cross-model activation patching
  knockout.py       attention knockout, from every layer upwards
  incremental.py    path patching by the causal cone, to tell the algorithm's share of a speed-up from the compiler's

Conventions. Prompts are right-padded; no attention mask is passed, because attention is causal and what stands behind a
position cannot change it. That also lets PyTorch choose its fastest attention kernel. The model is in eval mode, its
weights are on one device, and every result lies there. A *role* is a token position, one per example. A head is
(layer, query head).

Axes: B batch, T token, D embed, N query heads, K kv heads, H head dim, V vocab, L layers, P positions of one prompt.
"""
