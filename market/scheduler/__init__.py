"""What should run and where; a loop makes it so."""
