"""What a worker says about its cache: events, their log and cursor, their wire form and buses."""
