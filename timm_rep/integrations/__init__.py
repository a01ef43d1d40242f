"""What other libraries need of this package, a file each; nothing here is imported before it is asked for."""
