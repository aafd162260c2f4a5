"""Code that tests, benchmarks, tools and the demo share: servers, clients, models, processes, statistics."""
