// Package stage1 is what krg does as /init in the initramfs: from a bare kernel
// to the shared root.
//
//	drivers   by modalias, then NFS and overlay
//	link      the interface the firmware booted from, with a carrier
//	lease     DHCP, for ever
//	settings  from the head, if it has a node interface
//	root      NFS by mount(2), for ever; checked; an overlay for the host part
//	switch    the overlay becomes /, krg on it becomes PID 1 ("init")
//
// What may come right by waiting is tried for ever and says so each time; the
// rest ends in the rescue console. A kernel panic is never an answer.
package stage1

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/bootlog"
	"krgimage/node/cmdline"
	"krgimage/node/coldplug"
	"krgimage/node/enroll"
	"krgimage/node/rescue"
	"krgimage/node/retry"
	"krgimage/node/settings"
)

// Where stage 1 puts the new root before it becomes /.
const (
	nfsDir = "/nfsroot"
	newDir = "/newroot"
)

// boot is the state that the steps share, in the order in which it grows.
type boot struct {
	console  *bootlog.Console
	log      *slog.Logger
	timeline *bootlog.Timeline
	cmd      cmdline.Cmdline
	head     *settings.Head
	hand     settings.Handover
	stopPost func() // stops the poster and waits for it
}

// Main runs as PID 1 and doesn't return.
func Main(version string) {
	ctx := context.Background()
	signal.Notify(make(chan os.Signal, 1)) // Go's default for most signals is to exit
	mountErr := mountKernelFS()
	useConsole()
	go awaitRandom()
	console := bootlog.OpenConsole()
	log := slog.New(bootlog.NewHandler(console, slog.LevelInfo, bootlog.Uptime))
	b := &boot{
		console: console, log: log, stopPost: func() {},
		timeline: bootlog.NewTimeline(log, retry.System{}, bootlog.Uptime, nil),
	}
	b.timeline.Reached(bootlog.StageStage1, fmt.Sprintf("krg %s, Linux %s", version, kernelRelease()))
	err := mountErr
	if err == nil {
		err = rescue.Guard(func() error { return b.run(ctx) })
	}
	b.fail(ctx, err)
}

func (b *boot) run(ctx context.Context) error {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	b.cmd = cmdline.Parse(string(text))
	for _, p := range b.cmd.Problems {
		b.log.Warn(p.Error())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := b.drivers(ctx); err != nil {
		return err
	}
	l, err := getLease(ctx, b.log, b.timeline, b.cmd)
	if err != nil {
		return err
	}
	b.hand.Lease = l
	b.timeline.Reached(bootlog.StageLease, l.String())
	b.meetHead(ctx)

	src, err := rootSource(b.cmd.NFSRoot, b.hand.Settings, l)
	if err != nil {
		return rescue.Hint(err, "put nfsroot=SERVER:/PATH on the kernel command line")
	}
	if err := os.MkdirAll(nfsDir, 0o755); err != nil {
		return err
	}
	if err := src.Mount(ctx, b.log, nfsDir); err != nil {
		return err
	}
	b.hand.NFS, b.hand.Root, b.hand.Shares = src.String(), src, shares(b.log, src, b.hand.Settings)
	if b.hand.Image, err = checkRoot(nfsDir, settings.Binary); err != nil {
		return err
	}
	if r := kernelRelease(); b.hand.Image.KernelRelease != r {
		b.log.Warn("the root's kernel modules are for another kernel and won't load", "running", r, "root", b.hand.Image.KernelRelease)
	}
	if err := b.identify(); err != nil {
		return err
	}
	b.timeline.Reached(bootlog.StageRoot, fmt.Sprintf("%s, image %s %s", src, b.hand.Image.Name, b.hand.Image.Version))
	if err := makeOverlay(nfsDir, newDir); err != nil {
		return err
	}
	return b.switchOver()
}

// drivers loads what the machine's devices and the root need. Devices that
// show up later (USB, slow buses) are handled as long as stage 1 runs.
func (b *boot) drivers(ctx context.Context) error {
	loader, err := coldplug.Open("/")
	if err != nil {
		b.log.Warn("no modules in the initramfs; only built-in drivers work", "err", err)
		return nil
	}
	walk := func() {
		loaded, err := loader.Walk(ctx, "/sys/devices")
		if err != nil {
			b.log.Warn("some drivers don't load", "err", err)
		}
		if len(loaded) > 0 {
			b.log.Info("drivers: " + strings.Join(loaded, " "))
		}
	}
	if listener, err := coldplug.Listen(); err != nil {
		b.log.Warn("devices that appear later get no driver", "err", err)
	} else {
		go func() {
			err := rescue.Guard(func() error {
				return listener.Run(ctx, func(e coldplug.Event) {
					switch {
					case e.Action == "":
						walk()
					case e.Action == "add" && e.Env["MODALIAS"] != "":
						loaded, err := loader.Plug(e.Env["MODALIAS"])
						if err != nil {
							b.log.Warn("driver of a new device doesn't load", "path", e.Path, "err", err)
						}
						if len(loaded) > 0 {
							b.log.Info("drivers of a new device: " + strings.Join(loaded, " "))
						}
					}
				})
			})
			if err != nil {
				b.log.Warn("devices that appear later get no driver", "err", err)
			}
		}()
	}
	walk()
	var errs []error
	for _, name := range []string{"af_packet", "nfsv3", "overlay"} {
		// A name that is unknown here is built in, or its absence shows soon.
		if err := loader.Load(name); err != nil && !errors.Is(err, coldplug.ErrNoModule) {
			errs = append(errs, err)
		}
	}
	return rescue.Hint(errors.Join(errs...), "the initramfs doesn't fit the kernel: run 'krgimage build' and serve both from one image")
}

// fetchTries bounds the questions to a head that names itself in DHCP but
// doesn't answer or doesn't admit the node yet: about half a minute.
const fetchTries = 8

// meetHead asks the head for the node's settings and its identity and starts
// posting stages. Without a head the command line alone counts; without an
// identity the node boots, and its daemon goes on asking.
func (b *boot) meetHead(ctx context.Context) {
	url := b.hand.Lease.HeadURL
	if url == "" {
		b.log.Info("settings: DHCP names no head node; using the kernel command line")
		return
	}
	head, err := settings.NewHead(url)
	if err != nil {
		b.log.Warn("settings: using the kernel command line", "err", err)
		return
	}
	b.head = head
	b.startPosting(ctx)
	boot, err := settings.BootID()
	if err != nil {
		b.log.Warn("identity: the kernel doesn't name this boot", "err", err)
	}
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	wait := retry.Backoff{Min: 500 * time.Millisecond, Max: 5 * time.Second, Jitter: 0.5}
	err = retry.Do(ctx, retry.System{}, wait, func(ctx context.Context, attempt int) error {
		s, holder, err := enroll.Once(ctx, head, settings.IDDir, boot)
		if s.SessionID != 0 {
			b.hand.Settings, b.hand.Received = &s, bootlog.Uptime()
		}
		switch {
		case err == nil:
			id, _ := holder.ID()
			b.log.Info("identity: " + id.String())
			return nil
		case errors.Is(err, enroll.ErrNoCluster):
			return nil
		case attempt >= fetchTries || errors.Is(err, settings.ErrNoInterface) || s.SessionID == 0 && errors.Is(err, settings.ErrRefused):
			giveUp()
		}
		return err
	}, func(err error, wait time.Duration) {
		b.log.Warn("settings: asking the head again", "err", err, "again_in", wait.Round(100*time.Millisecond))
	})
	switch {
	case err == nil:
	case b.hand.Settings != nil:
		b.log.Warn("identity: none yet; the node's daemon will ask again", "err", err)
	default:
		b.log.Warn("settings: using the kernel command line", "err", err)
	}
}

// startPosting sends the stages noted so far and from now on.
func (b *boot) startPosting(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = rescue.Guard(func() error { return b.timeline.Run(ctx, b.head.PostStage) })
	}()
	b.stopPost = func() { cancel(); <-done }
}

// identify settles who the node is: by the command line, then the head, then
// Kerrighed's files in the root.
func (b *boot) identify() error {
	id := b.cmd.Identity(b.hand.Lease.Address.Addr())
	if s := b.hand.Settings; s != nil {
		if id.SessionID == cmdline.Unset {
			id.SessionID = s.SessionID
		}
		if id.NodeID == cmdline.Unset {
			id.NodeID = s.NodeID
		}
		if id != (cmdline.Identity{SessionID: s.SessionID, NodeID: s.NodeID}) {
			b.log.Warn("the head has other ids for this node than its command line, which counts",
				"session_id", id.SessionID, "node_id", id.NodeID, "head_session_id", s.SessionID, "head_node_id", s.NodeID)
		}
		b.hand.Hostname, b.hand.Domain = s.Hostname, s.Domain
	}
	for _, f := range []struct {
		field *string
		value string
	}{{&b.hand.Hostname, b.hand.Lease.Hostname}, {&b.hand.Domain, b.hand.Lease.Domain}} {
		if *f.field == "" && settings.ValidHostname(f.value) {
			*f.field = f.value
		}
	}
	if !id.Complete() {
		rootName, _ := os.ReadFile(filepath.Join(nfsDir, "etc/hostname"))
		if text, err := os.ReadFile(filepath.Join(nfsDir, "etc/kerrighed_nodes")); err == nil {
			nodes := cmdline.ParseNodesFile(string(text))
			for _, p := range nodes.Problems {
				b.log.Warn(p.Error())
			}
			id = nodes.Fill(id, strings.TrimSpace(string(rootName)), b.hand.Hostname)
		}
	}
	if !id.Complete() {
		return rescue.Hint(cmdline.ErrIncompleteIDs,
			"put session_id=N and node_id=M on the kernel command line (autonodeid=0 if M is not the last byte of the node's address), or serve the node with 'krgimage serve'")
	}
	if b.hand.Hostname == "" {
		b.hand.Hostname = fmt.Sprintf("node-%d", id.NodeID)
	}
	b.hand.Identity = id
	return nil
}

// switchOver leaves the initramfs; it returns only if that fails.
func (b *boot) switchOver() error {
	flush, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	if b.head != nil {
		b.timeline.Flush(flush)
	}
	cancel()
	b.stopPost()
	b.stopPost = func() {}
	b.hand.Pending = b.timeline.Pending()
	if err := b.hand.Save(settings.RunDir); err != nil {
		return fmt.Errorf("hand over to PID 1: %w", err)
	}
	err := switchRoot(newDir, map[string]string{
		"/dev": "dev", "/proc": "proc", "/sys": "sys", "/run": "run", nfsDir: settings.RootMount[1:],
	})
	if err != nil {
		return err
	}
	b.console.Flush(time.Second)
	err = unix.Exec(settings.Binary, []string{"init"}, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "TERM=linux"})
	return fmt.Errorf("start %s: %w", settings.Binary, err)
}

// fail says what went wrong to console and head, and stays in the rescue
// console until somebody decides. It never returns.
func (b *boot) fail(ctx context.Context, problem error) {
	b.stopPost()
	first, _, _ := strings.Cut(problem.Error(), "\n")
	b.timeline.Reached(bootlog.StageFailed, first)
	if b.head != nil {
		b.startPosting(ctx)
	}
	o := rescue.Options{Problem: problem}
	if b.hand.RescueShell() {
		o.Shell = rescue.FindShell()
	}
	b.console.Flush(2 * time.Second)
	action, _ := rescue.Console(ctx, o)
	stage, how := bootlog.StageReboot, unix.LINUX_REBOOT_CMD_RESTART
	if action == rescue.Poweroff {
		stage, how = bootlog.StagePoweroff, unix.LINUX_REBOOT_CMD_POWER_OFF
	}
	b.timeline.Reached(stage, "from the rescue console")
	if b.head != nil {
		flush, cancel := context.WithTimeout(ctx, 2*time.Second)
		b.timeline.Flush(flush)
		cancel()
	}
	for {
		_ = unix.Reboot(how)
		// Machines without a power switch stop here.
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_HALT)
		time.Sleep(time.Hour)
	}
}

// mountKernelFS mounts what every later step reads.
func mountKernelFS() error {
	for _, m := range []struct {
		fstype, dir string
		flags       uintptr
		data        string
	}{
		{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
		// krg itself runs from here, so no MS_NOEXEC.
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=50%"},
	} {
		if err := mountAt(m.fstype, m.dir, m.fstype, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return os.MkdirAll(settings.RunDir, 0o755)
}

// awaitRandom makes the kernel fill its random number generator. Without a
// hardware source it starts to do so only when somebody waits for it
// (try_to_generate_entropy in drivers/char/random.c), and sshd soon would.
func awaitRandom() {
	var b [1]byte
	_, _ = unix.Getrandom(b[:], 0)
}

// useConsole makes /dev/console the standard streams: an init started without
// one has none, and messages of the Go runtime go there.
func useConsole() {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return
	}
	for i := range 3 {
		if fd != i {
			_ = unix.Dup3(fd, i, 0)
		}
	}
	if fd > 2 {
		unix.Close(fd)
	}
}

func kernelRelease() string {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(uts.Release[:])
}
