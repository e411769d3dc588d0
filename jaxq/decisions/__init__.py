"""What to do at every site: schemes, policies, recipes, and the plan that resolves them for one program."""
