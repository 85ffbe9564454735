"""InfiniteBench's tasks (Zhang et al., arXiv 2402.13718): four of them generated."""
