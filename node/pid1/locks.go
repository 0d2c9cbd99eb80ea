package pid1

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/nsm"
	"krgimage/nfsroot/rpcbind"
	"krgimage/node/retry"
	"krgimage/node/settings"
	"krgimage/node/statd"
)

// mountLocked mounts the shared root for the container, with locks, in place of
// the mount that stage 1 brought. It tries for ever. The host part keeps the
// one without locks below its overlay: it needs none, and must not depend on
// the lock manager. The kernel has two page caches then, but the host part
// reads next to nothing from the root.
func (m *machine) mountLocked(ctx, bg context.Context) error {
	root := m.hand.Root
	if !root.Server.IsValid() || !root.WantsLocks() {
		m.log.Warn("file locks hold on this node only: the options of the root say so", "root", m.hand.NFS)
		return nil
	}
	monitor := statd.New(statd.Config{Name: m.hand.Hostname, Server: root.Server, State: nsm.StateAt(time.Now()), Log: m.log})
	listening := make(chan struct{})
	first := listening
	m.background(bg, "statd", func(ctx context.Context) error {
		sockets, err := statd.Listen()
		if err != nil {
			return err
		}
		if first != nil {
			close(first)
			first = nil
		}
		return monitor.Serve(ctx, sockets)
	})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-listening:
	}
	wait := retry.Backoff{Min: time.Second, Max: 15 * time.Second, Jitter: 0.5}
	err := retry.Do(ctx, retry.System{}, wait, func(ctx context.Context, _ int) error {
		return monitor.Announce(ctx)
	}, func(err error, wait time.Duration) {
		hint := "the root server's rpcbind (port 111) must answer"
		if errors.Is(err, rpcbind.ErrNotRegistered) {
			hint = "the root server has no lock manager: start it, or put nolock in the options of nfsroot="
		}
		m.log.Warn("no file locks yet, and no container without them; trying again", "server", root.Server, "err", err, "hint", hint, "again_in", wait.Round(100*time.Millisecond))
	})
	if err != nil {
		return err
	}
	if err := unix.Unmount(settings.RootMount, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		m.log.Warn("the root's first mount stays below the second", "err", err)
	}
	root.Locks = true
	return root.Mount(ctx, m.log, settings.RootMount)
}

// shares are the directories besides the root, with locks where the root has
// them.
func (m *machine) shares() []settings.Share {
	list := slices.Clone(m.hand.Shares)
	for i := range list {
		list[i].NFS.Locks = list[i].NFS.WantsLocks()
	}
	return list
}
