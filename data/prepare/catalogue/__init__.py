"""What files hold: looking into them (search), and the table of what was found (catalogue)."""
