"""KV-cache eviction inside `jit`: ReST-KV and its companions for JAX.

`restkv_jax.decode` is the module to import; it holds every public name.
"""
