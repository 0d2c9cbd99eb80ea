package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"

	"github.com/go-git/go-billy/v5/osfs"
	gonfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/helpers"
	"golang.org/x/sys/unix"

	"krgimage/nfsroot/nfs"
)

// isolated is set in the environment of the process that has namespaces of its
// own.
const isolated = "NFSLOAD_ISOLATED"

// isolate runs this program again in its own network and mount namespaces: the
// servers' ports and rpcbind's socket are nobody else's business.
func isolate(ctx context.Context, args []string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	return cmd.Run()
}

// loopback brings lo up.
func loopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// serve is a server process. With NFSLOAD_PROFILE set it writes a CPU profile
// there.
func serve(ctx context.Context, kind, dir, port string) error {
	if file := os.Getenv("NFSLOAD_PROFILE"); file != "" && kind == "own" {
		f, err := os.Create(file)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	ln, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		return err
	}
	switch kind {
	case "own":
		s, err := nfs.New(nfs.Config{Exports: []nfs.Export{{Path: "/", Dir: dir}}, HandleKey: make([]byte, 32)})
		if err != nil {
			return err
		}
		defer s.Close()
		return s.Serve(ctx, ln)
	case "go-nfs":
		context.AfterFunc(ctx, func() { ln.Close() })
		err := gonfs.Serve(ln, helpers.NewCachingHandler(helpers.NewNullAuthHandler(osfs.New(dir)), 200_000))
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	return fmt.Errorf("no server called %q", kind)
}

// running is a server process and how to reach it.
type running struct {
	target *target
	procs  []*exec.Cmd
}

func (r *running) stop() {
	for _, p := range r.procs {
		p.Process.Signal(syscall.SIGTERM)
	}
	for _, p := range r.procs {
		p.Wait()
	}
}

// start runs a program until its server is stopped.
func (r *running) start(ctx context.Context, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return err
	}
	r.procs = append(r.procs, cmd)
	r.target.pid = cmd.Process.Pid // the last started is the server
	return nil
}

func startOwn(ctx context.Context, kind, dir, port string) (*running, error) {
	addr := "127.0.0.1:" + port
	r := &running{target: &target{name: kind, nfs: addr, mount: addr, path: "/"}}
	if err := r.start(ctx, "/proc/self/exe", "serve", kind, dir, port); err != nil {
		return nil, err
	}
	return r, r.ready(ctx)
}

// ready waits until the server answers a mount.
func (r *running) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		_, err := mount(r.target.mount, r.target.path)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			r.stop()
			return fmt.Errorf("%s does not serve: %w", r.target.name, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Programs of nfs-ganesha; it can't do without rpcbind.
const (
	ganeshaProgram = "/usr/bin/ganesha.nfsd"
	rpcbindProgram = "/usr/sbin/rpcbind"
)

// ganeshaMissing says why nfs-ganesha can't run.
func ganeshaMissing() string {
	var missing []string
	for _, f := range []string{ganeshaProgram, rpcbindProgram} {
		if _, err := os.Stat(f); err != nil {
			missing = append(missing, f)
		}
	}
	if libs, _ := filepath.Glob("/usr/lib/*/ganesha/libfsalvfs.so"); len(libs) == 0 {
		missing = append(missing, "libfsalvfs.so")
	}
	if missing == nil {
		return ""
	}
	return strings.Join(missing, ", ") + " not found (apt-get install nfs-ganesha nfs-ganesha-vfs rpcbind)"
}

const ganeshaConf = `NFS_CORE_PARAM {
	NFS_Protocols = 3;
	NFS_Port = 22051;
	MNT_Port = 22052;
	Enable_NLM = false;
	Enable_RQUOTA = false;
}
EXPORT {
	Export_Id = 1;
	Path = %[1]s;
	Pseudo = %[1]s;
	Access_Type = RW;
	Squash = No_Root_Squash;
	SecType = sys;
	Transports = TCP;
	FSAL { Name = VFS; }
}
`

// startGanesha runs nfs-ganesha with its defaults in this namespace.
func startGanesha(ctx context.Context, dir string) (*running, error) {
	// rpcbind's socket and ganesha's state stay in this mount namespace.
	for _, d := range []string{"/run", "/var/lib/nfs"} {
		if err := unix.Mount("tmpfs", d, "tmpfs", 0, ""); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("mount a tmpfs on %s: %w", d, err)
		}
	}
	for _, d := range []string{"/run/ganesha", "/run/rpcbind", "/var/lib/nfs/ganesha"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	conf, log := "/run/ganesha/ganesha.conf", "/run/ganesha/ganesha.log"
	if err := os.WriteFile(conf, fmt.Appendf(nil, ganeshaConf, dir), 0o644); err != nil {
		return nil, err
	}
	r := &running{target: &target{name: "ganesha", nfs: "127.0.0.1:22051", mount: "127.0.0.1:22052", path: dir}}
	if err := r.start(ctx, rpcbindProgram, "-f", "-w"); err != nil {
		return nil, err
	}
	for range 100 {
		if _, err := os.Stat("/run/rpcbind.sock"); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	if err := r.start(ctx, ganeshaProgram, "-F", "-f", conf, "-L", log, "-p", "/run/ganesha/pid"); err != nil {
		r.stop()
		return nil, err
	}
	if err := r.ready(ctx); err != nil {
		said, _ := os.ReadFile(log)
		return nil, fmt.Errorf("%w\n%s", err, said[max(0, len(said)-2000):])
	}
	return r, nil
}
