package nfsclient

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/retry"
)

// dialTimeout bounds the look whether anything listens: the kernel's own
// mount(2) would be silent for minutes.
const dialTimeout = 5 * time.Second

// Mount mounts the tree at dir and tries for ever, saying so each time.
func (m Mount) Mount(ctx context.Context, log *slog.Logger, dir string) error {
	wait := retry.Backoff{Min: time.Second, Max: 15 * time.Second, Jitter: 0.5}
	return retry.Do(ctx, retry.System{}, wait, func(ctx context.Context, attempt int) error {
		target := netip.AddrPortFrom(m.Server, uint16(m.Port)).String()
		conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp4", target)
		if err != nil {
			return err
		}
		conn.Close()
		err = m.mount(ctx, log, dir)
		if err == nil || m.MountPort != m.Port {
			return err
		}
		// A kernel server has its MOUNT service elsewhere.
		other := m
		other.MountPort = 0
		if other.mount(ctx, log, dir) == nil {
			return nil
		}
		return err
	}, func(err error, wait time.Duration) {
		log.Warn("the root doesn't mount; trying again", "server", m.Server, "path", m.Path, "port", m.Port, "err", err, "again_in", wait.Round(100*time.Millisecond))
	})
}

// mount is mount(2) with a word on the console while it hangs.
func (m Mount) mount(ctx context.Context, log *slog.Logger, dir string) error {
	done := make(chan error, 1)
	go func() { done <- unix.Mount(m.String(), dir, "nfs", m.Flags, m.Data()) }()
	tick := time.NewTicker(15 * time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("mount %s: %w", m, err)
			}
			return nil
		case <-tick.C:
			log.Warn("the root server takes its time to answer MOUNT", "server", m.Server, "path", m.Path)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
