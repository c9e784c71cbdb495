"""Where does this go: token → experts, request → adapter, request → replica."""
