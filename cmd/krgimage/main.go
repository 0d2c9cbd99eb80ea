// Command krgimage builds a cluster's boot image and is its head node.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"krgimage/cmd/krgimage/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(cli.Run(ctx, cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}, os.Args[1:]))
}
