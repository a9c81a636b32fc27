"""Black-box tests of what the issue on other people's worlds asks for, one file a theme."""
