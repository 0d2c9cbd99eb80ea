// Command krg is everything that runs on a cluster node; see package cli for
// the names it answers to.
package main

import (
	"os"

	"krgimage/cmd/krg/cli"
)

func main() {
	os.Exit(cli.Main(os.Args, os.Stdout, os.Stderr))
}
