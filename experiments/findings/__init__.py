"""Which tokens, and how many in which head: policies and allocations side by side."""
