package pid1

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/bootlog"
	"krgimage/node/container"
	"krgimage/node/settings"
)

// Deadlines of going down. None of them is reached on a healthy node; each
// stands for a file server that doesn't answer any more.
const (
	stopPatience     = container.StopTime + 10*time.Second
	syncPatience     = 20 * time.Second
	hopelessPatience = 5 * time.Second // for sync, when the container didn't stop either
	postPatience     = 2 * time.Second
)

// goDown takes the node down in order: container, remaining processes, data,
// machine. It doesn't return.
func (m *machine) goDown(d Down, stopBackground context.CancelFunc) {
	m.timeline.Reached(d.Stage, d.Why)

	patience := syncPatience
	if !m.stopContainer() {
		// Most likely its processes wait for a dead file server. This makes
		// their requests fail; nothing more is to be had from that server.
		within(time.Second, func() { _ = unix.Unmount(settings.RootMount, unix.MNT_FORCE) })
		patience = hopelessPatience
	}

	// What is left are shells of a rescue console and programs started from one.
	_ = unix.Kill(-1, unix.SIGTERM)
	_ = unix.Kill(-1, unix.SIGKILL)

	if !within(patience, unix.Sync) {
		m.log.Warn("data couldn't be written to the file server in time; going down without", "after", patience)
	}
	within(time.Second, func() {
		_ = unix.Unmount(settings.RootMount, unix.MNT_FORCE|unix.MNT_DETACH)
	})
	if m.head != nil {
		ctx, cancel := context.WithTimeout(context.Background(), postPatience)
		m.timeline.Flush(ctx)
		cancel()
	}
	stopBackground()
	m.log.Info("down")
	m.console.Flush(time.Second)
	how := unix.LINUX_REBOOT_CMD_RESTART
	if d.Stage == bootlog.StagePoweroff {
		how = unix.LINUX_REBOOT_CMD_POWER_OFF
	}
	for {
		_ = unix.Reboot(how)
		// Machines without a power switch stop here.
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_HALT)
		time.Sleep(time.Hour)
	}
}

// stopContainer ends the container's processes, if need be by its cgroup, and
// reports whether its init is gone.
func (m *machine) stopContainer() bool {
	u := m.unit.Load()
	if u == nil {
		return true
	}
	m.stopUnit()
	ended := within(stopPatience, func() { <-m.unitDone }) && u.Status().PID == 0
	_ = os.WriteFile(cgroupDir+"/cgroup.kill", []byte("1\n"), 0)
	return ended
}

// within runs f and reports whether it ended in time. An f that hangs in the
// kernel stays behind.
func within(d time.Duration, f func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
}
