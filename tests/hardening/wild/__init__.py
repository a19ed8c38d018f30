"""What people do with adapted models beside training them as the pages say: each file is a thing that went wrong."""
