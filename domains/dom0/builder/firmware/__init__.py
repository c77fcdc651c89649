"""What hvmloader leaves in an HVM guest's memory for SeaBIOS, as pure functions: `layout.build_firmware` gives all of it."""
