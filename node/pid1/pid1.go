// Package pid1 is krg as PID 1 of a node's host part, after stage 1.
//
// It gives the node what is its own (mounts, name, time), keeps its lease,
// loads the drivers that stage 1 could do without, keeps the container
// running, and takes the node down in order. The host part runs nothing else.
//
// The shared root may go away under a running node and come back. So PID 1
// never depends on it: krg runs from a copy in memory (made and checked by
// stage 1), /dev, /proc, /sys, /run and /tmp are found without asking the file
// server, and what does touch it (drivers, sync) happens beside the main loop,
// with a deadline where the main loop has to wait.
package pid1

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/bootlog"
	"krgimage/node/coldplug"
	"krgimage/node/container"
	"krgimage/node/control"
	"krgimage/node/lease"
	"krgimage/node/rescue"
	"krgimage/node/retry"
	"krgimage/node/settings"
	"krgimage/node/supervise"
)

// machine is the node while it runs.
type machine struct {
	console  *bootlog.Console
	log      *slog.Logger
	hand     settings.Handover
	head     *settings.Head // nil: no head to report to
	timeline *bootlog.Timeline
	reaper   *supervise.Reaper
	unit     atomic.Pointer[supervise.Unit] // the container; nil until it is started
	stopUnit context.CancelFunc             // nil until the container was started
	unitDone <-chan struct{}
	ready    chan struct{} // closed when the container's sshd answered for the first time
	down     chan Down     // the first wish to go down; later ones are dropped
}

// Down is a wish to stop the node.
type Down struct {
	Stage string // bootlog.StagePoweroff or bootlog.StageReboot
	Why   string
}

// Main runs as PID 1 and doesn't return.
func Main(version string) {
	everything := make(chan os.Signal, 16)
	signal.Notify(everything) // Go's default for most signals is to exit
	console := bootlog.OpenConsole()
	log := slog.New(bootlog.NewHandler(console, slog.LevelInfo, bootlog.Uptime))
	m := &machine{console: console, log: log, reaper: supervise.NewReaper(true), ready: make(chan struct{}), down: make(chan Down, 1)}

	bg, stop := context.WithCancel(context.Background())
	m.background(bg, "reaper", m.reaper.ReapAll)
	m.background(bg, "signals", func(ctx context.Context) error { return m.signals(ctx, everything) })

	err := rescue.Guard(func() error { return m.start(bg, version) })
	if err != nil {
		m.fail(bg, err)
	}
	d := <-m.down
	m.goDown(d, stop)
}

// background runs f beside everything else and again when it fails: one
// broken service must not take the node along.
func (m *machine) background(ctx context.Context, name string, f func(context.Context) error) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wait := retry.Backoff{Min: time.Second, Max: time.Minute}
		for {
			err := rescue.Guard(func() error { return f(ctx) })
			if err == nil || ctx.Err() != nil {
				return
			}
			d := wait.Next()
			m.log.Error(name+" failed", "err", err, "again_in", d)
			if retry.Wait(ctx, retry.System{}, d) != nil {
				return
			}
		}
	}()
	return done
}

// start brings the node up; it returns when everything runs in the background.
func (m *machine) start(bg context.Context, version string) error {
	hand, err := settings.LoadHandover(settings.RunDir)
	if err != nil {
		m.timeline = bootlog.NewTimeline(m.log, retry.System{}, bootlog.Uptime, nil)
		return rescue.Hint(fmt.Errorf("krg was started as init without its first stage: %w", err),
			"boot the node with the kernel and initramfs of 'krgimage build'")
	}
	m.hand = hand
	m.timeline = bootlog.NewTimeline(m.log, retry.System{}, bootlog.Uptime, hand.Pending)
	if hand.Settings != nil {
		if m.head, err = settings.NewHead(hand.Lease.HeadURL); err == nil {
			m.background(bg, "timeline", func(ctx context.Context) error { return m.timeline.Run(ctx, m.head.PostStage) })
		}
	}
	if err := mountPrivate(); err != nil {
		return err
	}
	if err := m.introduce(); err != nil {
		return err
	}
	m.timeline.Reached(bootlog.StageInit, fmt.Sprintf("krg %s, session %d node %d (%s)", version, hand.Identity.SessionID, hand.Identity.NodeID, hand.Hostname))

	// From here on ctrl-alt-del is a signal to us, not the kernel's reboot.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)

	server, err := control.Listen(filepath.Join(settings.SharedDir, settings.ControlSocket))
	if err != nil {
		return err
	}
	m.background(bg, "control socket", func(ctx context.Context) error { return server.Serve(ctx, m) })
	m.background(bg, "lease", m.keepLease)
	m.background(bg, "drivers", m.drivers)
	m.background(bg, "power button", m.powerButton)
	return m.startContainer(bg)
}

// sysctls are the kernel settings of a node.
var sysctls = []struct{ file, value string }{
	{"kernel/pid_max", "4194304"}, // pids of the cluster are 22 bits wide
	// Debian's ping has neither setuid nor a file capability; it counts on this.
	{"net/ipv4/ping_group_range", "0 2147483647"},
}

// introduce sets the clock and the node's name and writes what the container
// may know of the node.
func (m *machine) introduce() error {
	h := m.hand
	if h.Settings != nil && !h.Settings.Time.IsZero() {
		m.setClock(h.Settings.Time.Add(bootlog.Uptime() - h.Received))
	}
	if err := unix.Sethostname([]byte(h.Hostname)); err != nil {
		return fmt.Errorf("set host name %q: %w", h.Hostname, err)
	}
	if h.Domain != "" {
		_ = unix.Setdomainname([]byte(h.Domain))
	}
	for _, s := range sysctls {
		if err := os.WriteFile(filepath.Join("/proc/sys", s.file), []byte(s.value+"\n"), 0); err != nil {
			m.log.Warn("kernel setting not made", "setting", s.file, "value", s.value, "err", err)
		}
	}
	if err := os.MkdirAll(settings.SharedDir, 0o755); err != nil {
		return err
	}
	return errors.Join(m.writeNode(h.Lease), writeMachineID(h.Identity.SessionID, h.Lease.MAC),
		writeResolvConf(filepath.Join(settings.SharedDir, settings.ResolvConf), h.Lease))
}

// writeMachineID writes the node's machine-id(5), the same at each boot: the
// shared root's /etc/machine-id is a link to it.
func writeMachineID(session int, mac string) error {
	sum := sha256.Sum256(fmt.Appendf(nil, "krgimage machine-id %d %s", session, mac))
	return os.WriteFile(filepath.Join(settings.SharedDir, settings.MachineID), fmt.Appendf(nil, "%x\n", sum[:16]), 0o644)
}

func (m *machine) writeNode(l lease.Lease) error {
	n := settings.Node{
		SessionID: m.hand.Identity.SessionID, NodeID: m.hand.Identity.NodeID, Hostname: m.hand.Hostname, Domain: m.hand.Domain,
		Interface: l.Interface, MAC: l.MAC, Addresses: []string{l.Address.String()}, Head: l.HeadURL, Root: m.hand.NFS, Image: m.hand.Image,
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		n.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	return n.Save(settings.SharedDir)
}

// writeResolvConf writes the lease's name servers to file.
func writeResolvConf(file string, l lease.Lease) error {
	return os.WriteFile(file, []byte(l.ResolvConf()), 0o644)
}

// keepLease keeps the lease and what hangs on it. The container finds its name
// servers in /run/krg/resolv.conf, since its /etc is everybody's; the host
// part's own file is made here, beside the main loop, because the first change
// in /etc copies the directory from the file server.
func (m *machine) keepLease(ctx context.Context) error {
	_ = os.Remove("/etc/resolv.conf") // in the image it may be a link to the container's file
	if err := writeResolvConf("/etc/resolv.conf", m.hand.Lease); err != nil {
		m.log.Warn("host part has no name servers", "err", err)
	}
	k := lease.Keeper{Log: m.log.With("component", "lease"), Clock: retry.System{}, Uptime: bootlog.Uptime, Renewed: func(l lease.Lease) {
		m.hand.Lease = l
		if err := errors.Join(l.Apply(), writeResolvConf(filepath.Join(settings.SharedDir, settings.ResolvConf), l)); err != nil {
			m.log.Warn("renewed lease not applied", "err", err)
		}
	}}
	return k.Keep(ctx, m.hand.Lease)
}

// driverPatience is how long the remaining drivers wait for the node to be
// ready. They are many (graphics, sound, sensors) and take seconds of CPU time
// that the first login can use better.
const driverPatience = 30 * time.Second

// drivers loads what the root has for this machine's devices, now and as
// devices appear. Its files are on the file server, so it may hang with it.
func (m *machine) drivers(ctx context.Context) error {
	listener, err := coldplug.Listen()
	if err != nil {
		return err
	}
	loader, err := coldplug.Open("/")
	if err != nil {
		listener.Close()
		m.log.Warn("no drivers from the root", "err", err)
		return nil
	}
	walk := func() {
		loaded, err := loader.Walk(ctx, "/sys/devices")
		if len(loaded) > 0 {
			m.log.Info("drivers: " + strings.Join(loaded, " "))
		}
		if err != nil {
			m.log.Warn("some drivers don't load", "err", err)
		}
	}
	for _, name := range []string{"button", "evdev"} { // for powerButton
		if err := loader.Load(name); err != nil && !errors.Is(err, coldplug.ErrNoModule) {
			m.log.Warn("the power button may not work", "err", err)
		}
	}
	select {
	case <-ctx.Done():
	case <-m.ready:
	case <-time.After(driverPatience):
	}
	walk()
	return listener.Run(ctx, func(e coldplug.Event) {
		switch {
		case e.Action == "":
			walk()
		case e.Action == "add" && e.Env["MODALIAS"] != "":
			if _, err := loader.Plug(e.Env["MODALIAS"]); err != nil {
				m.log.Warn("driver of a new device doesn't load", "path", e.Path, "err", err)
			}
		}
	})
}

// startContainer puts the container under supervision and watches for its
// sshd. It doesn't wait for either.
func (m *machine) startContainer(bg context.Context) error {
	cgroup := containerCgroup(m.log)
	config := container.Config{
		Root: settings.RootMount, Hostname: m.hand.Hostname, Domain: m.hand.Domain, Shared: settings.SharedDir, Shares: m.shares(),
		Services: []container.Service{container.SSHD()},
	}
	started := make(chan struct{}, 1)
	unit := supervise.New(supervise.Service{
		Name:        "container",
		Command:     func() (*exec.Cmd, error) { return container.Command(settings.Binary, config, cgroup) },
		StopTimeout: container.StopTime,
		LogSize:     256 << 10,
		OnStart: func(pid int) {
			m.timeline.Reached(bootlog.StageContainer, fmt.Sprintf("pid %d", pid))
			select {
			case started <- struct{}{}:
			default:
			}
		},
		OnExit: m.containerEnded,
	}, m.reaper, retry.System{}, m.log)
	unitCtx, stopUnit := context.WithCancel(bg)
	m.unit.Store(unit)
	m.stopUnit = stopUnit
	mounted := false
	m.unitDone = m.background(unitCtx, "container", func(ctx context.Context) error {
		if !mounted {
			if err := m.mountLocked(ctx, bg); err != nil {
				return err
			}
			mounted = true
		}
		return unit.Run(ctx)
	})
	var first sync.Once
	m.background(bg, "ready", func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-started:
			}
			banner, err := waitForSSH(ctx, "127.0.0.1:2222")
			if err != nil {
				return nil
			}
			m.timeline.Reached(bootlog.StageReady, banner)
			first.Do(func() { close(m.ready) })
		}
	})
	return nil
}

// containerEnded translates reboot(2) in the container: the kernel ends the
// PID namespace's init with a signal that names the command (pid_namespaces(7)).
func (m *machine) containerEnded(status unix.WaitStatus) {
	if !status.Signaled() {
		return
	}
	switch status.Signal() {
	case unix.SIGHUP:
		m.wish(bootlog.StageReboot, "reboot(2) in the container")
	case unix.SIGINT:
		m.wish(bootlog.StagePoweroff, "reboot(2) in the container")
	}
}

// waitForSSH waits until an SSH server sends its banner, and returns that.
// There is nothing to wait on for a socket that isn't there yet, so it asks.
func waitForSSH(ctx context.Context, address string) (string, error) {
	var banner string
	wait := retry.Backoff{Min: 100 * time.Millisecond, Max: time.Second}
	err := retry.Do(ctx, retry.System{}, wait, func(ctx context.Context, _ int) error {
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 255) // RFC 4253, section 4.2
		n, err := conn.Read(buf)
		if err != nil {
			return err
		}
		line, _, _ := strings.Cut(string(buf[:n]), "\r\n")
		if !strings.HasPrefix(line, "SSH-") {
			return fmt.Errorf("%s: not an SSH server", address)
		}
		banner = line
		return nil
	}, func(error, time.Duration) {})
	return banner, err
}

// fail is the end of a node that can't come up.
func (m *machine) fail(bg context.Context, problem error) {
	first, _, _ := strings.Cut(problem.Error(), "\n")
	m.timeline.Reached(bootlog.StageFailed, first)
	o := rescue.Options{Problem: problem, Run: m.runCommand}
	if m.hand.RescueShell() {
		o.Shell = rescue.FindShell()
	}
	m.console.Flush(2 * time.Second)
	go func() {
		action, err := rescue.Console(bg, o)
		switch {
		case err != nil:
		case action == rescue.Poweroff:
			m.wish(bootlog.StagePoweroff, "from the rescue console")
		default:
			m.wish(bootlog.StageReboot, "from the rescue console")
		}
	}()
}

// runCommand runs cmd to its end under the reaper.
func (m *machine) runCommand(cmd *exec.Cmd) error {
	child, err := m.reaper.Start(cmd)
	if err != nil {
		return err
	}
	<-child.Done()
	return nil
}

// signals turns the signals that ask an init to go down into wishes: USR1,
// USR2 and PWR as with the traditional inits, INT is ctrl-alt-del.
func (m *machine) signals(ctx context.Context, ch <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-ch:
			switch s {
			case unix.SIGUSR1, unix.SIGUSR2, unix.SIGPWR:
				m.wish(bootlog.StagePoweroff, "signal "+unix.SignalName(s.(unix.Signal)))
			case unix.SIGTERM:
				m.wish(bootlog.StageReboot, "signal SIGTERM")
			case unix.SIGINT:
				m.wish(bootlog.StageReboot, "ctrl-alt-del")
			}
		}
	}
}

func (m *machine) wish(stage, why string) {
	select {
	case m.down <- Down{stage, why}:
	default:
	}
}
