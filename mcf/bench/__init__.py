"""How fast the parts of a run are: `python -m mcf.bench part=step|levers|fed|loader|…`."""
