"""The commands, one file each; `timewait.cli` lists them and loads a file only when it is called."""
