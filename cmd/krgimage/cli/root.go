package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"krgimage/configs"
	"krgimage/images"
	"krgimage/images/progress"
	"krgimage/nfsroot/knfsd"
	"krgimage/nfsroot/live"
	"krgimage/nfsroot/nfs"
	"krgimage/nfsroot/remote"
	"krgimage/pxe/head"
	"krgimage/pxe/httpboot"
)

// Servers of the root on this machine.
const (
	nfsBuiltin = "builtin"
	nfsKernel  = "kernel"
)

// checkNFS checks the flag --nfs.
func checkNFS(c configs.Cluster, server string) error {
	switch {
	case server != nfsBuiltin && server != nfsKernel:
		return usageError{fmt.Errorf("--nfs: %q is neither %s nor %s", server, nfsBuiltin, nfsKernel)}
	case server == nfsKernel && c.NFSRoot.External():
		return usageError{fmt.Errorf("--nfs=kernel: the root is on %s (nfsroot.server), no NFS is served here", c.NFSRoot.Server)}
	}
	return nil
}

// rootServer says how nodes get their root.
type rootServer struct {
	server head.NFS // nil: not this process
	at     httpboot.Root
	mounts []httpboot.Mount

	locks   head.Locks   // nil: not this process
	stats   func() any   // counters of a server in this process; nil: there is none
	metrics http.Handler // the same for Prometheus
}

// openRoot brings the root up to the image, wherever it lives, and opens what
// serves it. h is told what to close.
func (a *app) openRoot(ctx context.Context, h *headNode, c configs.Cluster, state string, im *images.Image, o headOptions) (rootServer, error) {
	if c.NFSRoot.External() {
		return a.externalRoot(ctx, h, c, state, im, o)
	}
	var err error
	if h.root, err = a.syncRoot(ctx, c, state, "", im, o); err != nil {
		return rootServer{}, err
	}
	if o.nfs == nfsKernel {
		return kernelRoot(ctx, h, c, o)
	}
	return builtinRoot(h, c, state, o)
}

// builtinRoot serves the root by krgimage's own server, to the machines that the
// head has given an address. What is not the root is exported by the name under
// which nodes have it.
func builtinRoot(h *headNode, c configs.Cluster, state string, o headOptions) (rootServer, error) {
	r := rootServer{at: httpboot.HeadRoot(&c, "/")}
	exports := []nfs.Export{{Path: "/", Dir: h.root.Dir, Kept: h.root.Kept}}
	for _, e := range c.NFSRoot.Exports {
		exports = append(exports, nfs.Export{Path: e.At, Dir: e.Path, ReadOnly: e.ReadOnly, RootSquash: e.Squash == "root"})
		r.mounts = append(r.mounts, httpboot.Mount{Path: e.At, At: e.At, ReadOnly: e.ReadOnly})
	}
	key, err := nfs.LoadKey(filepath.Join(state, "head", "nfs.key"))
	if err != nil {
		return r, err
	}
	// The registry is made by the head, and the head wants the servers; nobody
	// can ask before both are there.
	admitted := func(addr netip.Addr) bool {
		_, known := h.Nodes().ByAddress(addr)
		return known
	}
	server, err := nfs.New(nfs.Config{Exports: exports, HandleKey: key, Log: o.log, Allow: admitted, PrivilegedPorts: true, ReplayLog: filepath.Join(state, "head", "nfs.replays")})
	if err != nil {
		return r, err
	}
	h.close = append(h.close, func() { server.Close() })
	locks, err := openLocks(c, server, o, admitted)
	if err != nil {
		return r, err
	}
	h.close = append(h.close, func() { locks.Close() })
	r.locks = locks
	r.server, r.stats, r.metrics = server, func() any { return server.Stats() }, metrics(server)
	return r, nil
}

// kernelRoot has the kernel serve the root.
func kernelRoot(ctx context.Context, h *headNode, c configs.Cluster, o headOptions) (rootServer, error) {
	r := rootServer{at: httpboot.HeadRoot(&c, h.root.Dir)}
	exports := []knfsd.Export{{Dir: h.root.Dir}}
	for _, e := range c.NFSRoot.Exports {
		exports = append(exports, knfsd.Export{Dir: e.Path, ReadOnly: e.ReadOnly, RootSquash: e.Squash == "root"})
		r.mounts = append(r.mounts, httpboot.Mount{Path: e.Path, At: e.At, ReadOnly: e.ReadOnly})
	}
	step := o.report.Step("Kernel NFS")
	server, err := knfsd.Start(ctx, knfsd.Config{
		Name: c.Name, Exports: exports, Clients: kernelClients(c), Port: c.Network.NFSPort,
		Record: filepath.Join(o.state, "head", "knfsd.json"), System: knfsd.Real{}, Log: o.log,
	})
	if err != nil {
		return r, step.Fail(err)
	}
	h.close = append(h.close, func() {
		if err := server.Close(); err != nil {
			o.log.Error("the kernel's NFS server is not put back as it was", "component", "knfsd", "err", err)
		}
	})
	if !ownFileSystem(h.root.Dir) {
		o.log.Warn("the kernel's NFS server guards file systems, not directories: a node that forges file handles reaches every file beside the root; give it a file system of its own",
			"component", "knfsd", "directory", filepath.Dir(h.root.Dir))
	}
	_, err = remote.Check(ctx, remote.Root{Server: c.Network.Head, Port: c.Network.NFSPort, Path: h.root.Dir})
	if err != nil && !errors.Is(err, remote.ErrRefused) { // the head need not be a client
		return r, step.Fail(fmt.Errorf("the kernel's NFS server doesn't serve the root: %w", err))
	}
	step.Done("%s to %s", h.root.Dir, strings.Join(kernelClients(c), " "))
	return r, nil
}

// kernelClients are the clients for exports(5): the machines of the table where
// no others may join, else the whole subnet.
func kernelClients(c configs.Cluster) []string {
	if c.Nodes.Unknown != "refuse" {
		return []string{c.Network.Subnet.String()}
	}
	var clients []string
	for _, n := range c.Nodes.Table {
		clients = append(clients, n.Address.String())
	}
	return clients
}

// ownFileSystem reports whether the trees' directory is the top of a mount.
func ownFileSystem(root string) bool {
	dir := filepath.Dir(root)
	var st, above syscall.Stat_t
	return syscall.Stat(dir, &st) == nil && syscall.Stat(filepath.Dir(dir), &above) == nil && st.Dev != above.Dev
}

// externalRoot has nodes mount the root from an existing server.
func (a *app) externalRoot(ctx context.Context, h *headNode, c configs.Cluster, state string, im *images.Image, o headOptions) (rootServer, error) {
	n := c.NFSRoot
	r := rootServer{at: httpboot.Root{Server: n.Server, Port: n.Port, Path: n.Path, Options: n.Options}}
	if n.Mounted != "" {
		var err error
		if h.root, err = a.syncRoot(ctx, c, state, n.Mounted, im, o); err != nil {
			return r, err
		}
		r.at.Path = path.Join(n.Path, filepath.Base(h.root.Dir))
	}
	step := o.report.Step("Root server")
	err := checkExternal(ctx, r.at, c, im, o.log)
	if err != nil {
		return r, step.Fail(err)
	}
	step.Done("%s", r.at)
	return r, nil
}

// checkExternal asks the server for the root as a node would, and says what to
// do when it isn't there.
func checkExternal(ctx context.Context, at httpboot.Root, c configs.Cluster, im *images.Image, log *slog.Logger) error {
	r := remote.Root{Server: at.Server, Port: at.Port, Path: at.Path}
	for _, o := range at.Options {
		if value, ok := strings.CutPrefix(o, "mountport="); ok {
			r.MountPort, _ = strconv.Atoi(value)
		}
	}
	unpack := "unpack the file of 'krgimage export rootfs' on the server in " + at.Path
	if c.NFSRoot.Mounted != "" {
		unpack = fmt.Sprintf("look whether %s on this machine is the directory %s of the server", c.NFSRoot.Mounted, c.NFSRoot.Path)
	}
	id, err := remote.Check(ctx, r)
	if err == nil || errors.Is(err, remote.ErrRefused) {
		if lockErr := checkLocks(ctx, at); lockErr != nil {
			return lockErr
		}
	}
	switch {
	case errors.Is(err, remote.ErrRefused):
		log.Warn("the root server doesn't let this machine look at the root, so each node will check it for itself; export it to the nodes with root as root (no_root_squash)", "component", "head", "err", err)
		return nil
	case errors.Is(err, remote.ErrNoAnswer):
		return fmt.Errorf("%w\n  fix: start the server, or correct nfsroot.server and nfsroot.port", err)
	case errors.Is(err, remote.ErrNoPath):
		return fmt.Errorf("%w\n  fix: export it on the server with root as root (no_root_squash), or correct nfsroot.path", err)
	case errors.Is(err, remote.ErrNoImage):
		return fmt.Errorf("%w\n  fix: %s", err, unpack)
	case err != nil:
		return err
	case id != im.Manifest.BuildID:
		return fmt.Errorf("the root %s is of the image %s, but this head node serves %s: the kernel would find no modules there\n  fix: %s", r, id, im.Manifest.BuildID, unpack)
	}
	return nil
}

// checkLocks asks for the lock manager, without which nodes start no container.
func checkLocks(ctx context.Context, at httpboot.Root) error {
	if slices.Contains(at.Options, "nolock") || slices.Contains(at.Options, "local_lock=all") {
		return nil
	}
	const progNLM, versNLM = 100021, 4
	port, err := remote.Portmap(ctx, at.Server, progNLM, versNLM)
	if err == nil && port == 0 {
		err = errors.New("its rpcbind knows none")
	}
	if err != nil {
		return fmt.Errorf("the root server %s has no lock manager for NFS version 3: %w\n  fix: start it there (Ganesha: Enable_NLM = true), or write nfsroot.options: [nolock]; then locks hold on one node only", at.Server, err)
	}
	return nil
}

// installRoot brings the root on an existing server up to a new image, when it
// is mounted here and no node can be up.
func (a *app) installRoot(ctx context.Context, c configs.Cluster, im *images.Image, report *progress.Reporter) error {
	dir := c.NFSRoot.Mounted
	if dir == "" {
		return nil
	}
	later := func(why string) error {
		fmt.Fprintf(a.Err, "%s: 'krgimage serve' will install the image in %s when it starts\n", why, dir)
		return nil
	}
	if os.Geteuid() != 0 {
		return later("not root")
	}
	state, err := a.state()
	if err != nil {
		return err
	}
	unlock, err := images.Lock(filepath.Join(state, "head", "lock"), "build")
	if busy := (*images.BusyError)(nil); errors.As(err, &busy) {
		return later("a head node is running")
	}
	if err != nil {
		return err
	}
	defer unlock()
	_, err = a.syncRoot(ctx, c, state, dir, im, headOptions{log: a.logger(slog.LevelWarn), report: report})
	return err
}

// places are the directories that nodes have besides the root.
func places(c configs.Cluster) []live.Place {
	var list []live.Place
	for _, e := range c.NFSRoot.Exports {
		list = append(list, live.Place{At: e.At, Dir: e.Path})
	}
	return list
}
