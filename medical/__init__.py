"""Medical domain of adaptsuite."""
