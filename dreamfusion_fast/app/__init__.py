"""A web page for runs: asked for, watched, stopped, resumed and looked at in a browser."""
