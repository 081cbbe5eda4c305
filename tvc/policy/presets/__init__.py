"""The policies that ship with the compiler, one YAML file each."""
