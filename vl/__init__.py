"""Vision-language domain of adaptsuite."""
