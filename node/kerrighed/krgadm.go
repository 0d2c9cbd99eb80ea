package kerrighed

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/api"
	"krgimage/node/krgadm"
	"krgimage/node/retry"
	"krgimage/node/settings"
)

// runKrgadm runs krgadm against the node daemon of this machine.
func runKrgadm(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	client := api.NewClient(filepath.Join(settings.SharedDir, api.SocketName), filepath.Join(settings.RunDir, api.SocketName))
	defer client.Close()
	wait := func(ctx context.Context, d time.Duration) error { return retry.Wait(ctx, retry.System{}, d) }
	p := krgadm.Program{Cluster: patient{client, onNode(), wait}, Out: stdout, Err: stderr, Wait: wait}
	return p.Run(ctx, args)
}

// onNode reports whether this machine is a running node.
func onNode() bool {
	_, err := settings.LoadNode()
	return !errors.Is(err, os.ErrNotExist)
}

// patient is a client that waits a moment for a daemon that has ended: the
// node's init starts it again at once.
type patient struct {
	*api.Client
	node bool
	wait func(context.Context, time.Duration) error
}

const (
	restartTime  = 5 * time.Second
	restartPause = 200 * time.Millisecond
)

func (p patient) Status(ctx context.Context) (api.Status, error) {
	for waited := time.Duration(0); ; waited += restartPause {
		s, err := p.Client.Status(ctx)
		if !p.node || !errors.Is(err, unix.ENOSYS) || waited >= restartTime || p.wait(ctx, restartPause) != nil {
			return s, err
		}
	}
}
