"""How good an approximation is; never imported by models, guides or losses."""
