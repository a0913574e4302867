"""Volume rendering: of fields with a tile source as a stream of tiles, of any other in chunks."""
