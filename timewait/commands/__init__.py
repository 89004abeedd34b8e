"""The commands, one file each. `timewait.cli` lists them and loads a file when it is called."""
