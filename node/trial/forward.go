package trial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	guestSSH  = 2222 // port of sshd on the nodes
	firstPort = 2201 // on loopback, for node 1
	dialLimit = 15 * time.Second
	connLimit = 256 // at once, per node
)

// listenSSH takes a loopback port for each machine: the one it had last time,
// else 2200 plus its id, else the next free one.
func listenSSH(machines []Machine, last map[int]string) (map[int]net.Listener, error) {
	taken := map[int]net.Listener{}
	try := func(id, port int) (bool, error) {
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EACCES) {
			return false, nil
		}
		if err == nil {
			taken[id] = l
		}
		return err == nil, err
	}
	var err error
	for _, m := range machines {
		// All the old ports first, so that nobody is given another's.
		if a, perr := netip.ParseAddrPort(last[m.ID]); perr == nil && a.Addr().IsLoopback() && err == nil {
			_, err = try(m.ID, int(a.Port()))
		}
	}
	for _, m := range machines {
		for port := firstPort - 1 + m.ID; taken[m.ID] == nil && err == nil; port++ {
			if port > 65535 {
				err = errors.New("no port is free")
				break
			}
			_, err = try(m.ID, port)
		}
	}
	if err != nil {
		for _, l := range taken {
			l.Close()
		}
		return nil, fmt.Errorf("loopback ports for ssh: %w", err)
	}
	return taken, nil
}

// forward connects whoever comes to l with the guest, until ctx ends.
func forward(ctx context.Context, l net.Listener, dial func(context.Context) (net.Conn, error)) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(connLimit + 1)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	group.Go(func() error {
		for {
			near, err := l.Accept()
			if err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("ssh forward on %s: %w", l.Addr(), err)
			}
			busy := !group.TryGo(func() error {
				connect(ctx, near, dial)
				return nil
			})
			if busy {
				near.Close()
			}
		}
	})
	return group.Wait()
}

// connect dials and splices. A guest that doesn't answer shows as a connection
// that closes at once.
func connect(ctx context.Context, near net.Conn, dial func(context.Context) (net.Conn, error)) {
	defer near.Close()
	dctx, cancel := context.WithTimeout(ctx, dialLimit)
	far, err := dial(dctx)
	cancel()
	if err != nil {
		return
	}
	defer far.Close()
	stop := context.AfterFunc(ctx, func() { near.Close(); far.Close() })
	defer stop()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		both.Go(func() {
			from, to := way[0], way[1]
			if _, err := io.Copy(to, from); err != nil {
				// Broken, not ended: the other way can't end by itself.
				near.Close()
				far.Close()
				return
			}
			if half, ok := to.(interface{ CloseWrite() error }); ok {
				half.CloseWrite()
			}
		})
	}
	both.Wait()
}
