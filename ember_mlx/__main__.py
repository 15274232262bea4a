from ember_mlx.cli import main

main()
