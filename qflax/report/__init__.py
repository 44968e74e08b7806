"""One page about several runs: a table, plots, and what each network learned."""
