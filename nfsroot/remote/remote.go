// Package remote looks at a root on an NFS server that is not krgimage's own: a
// filer, NFS-Ganesha, a kernel's nfsd. It goes the way that nodes go: NFS
// answers on its port, MOUNT on the same port or where the portmapper says, MNT
// hands out the path, and /etc/krgimage/image.json there tells the image.
//
// The head node asks before it sends nodes to such a server, so that what is
// wrong is said once, by the head, and not by every node's console. The package
// changes nothing on the server.
package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Root is a root on a server.
type Root struct {
	Server    netip.Addr
	Port      int // of NFS
	MountPort int // of MOUNT; 0: NFS's, or else the portmapper's
	Path      string
}

func (r Root) String() string { return r.Server.String() + ":" + r.Path }

// What can be wrong, for callers that decide on it.
var (
	ErrNoAnswer = errors.New("no answer")                           // nobody serves NFS version 3 there
	ErrRefused  = errors.New("this machine may not mount it")       // nodes still may
	ErrNoPath   = errors.New("the server has no such directory")    //
	ErrNoImage  = errors.New("it holds no root that krgimage made") //
)

// MOUNT version 3 and NFS version 3 (RFC 1813), the portmapper version 2 (RFC 1833).
const (
	progPortmap, versPortmap = 100000, 2
	progNFS                  = 100003
	progMount                = 100005
	vers3                    = 3

	portPortmap = 111

	procGetPort = 3
	procMnt     = 1
	procUmnt    = 3
	procLookup  = 3
	procRead    = 6

	ipprotoTCP = 6

	statusPerm, statusNoEnt, statusAcces, statusNotDir = 1, 2, 13, 20
)

// imageFile is where a root says which image it was made of.
var imageFile = []string{"etc", "krgimage", "image.json"}

// maxImageFile bounds what is read of it; it has a few hundred bytes.
const maxImageFile = 16 << 10

// Check asks the server for the root and returns the build id of the image that
// it was made of.
func Check(ctx context.Context, r Root) (buildID string, err error) {
	nfs, err := dial(ctx, r.Server, r.Port)
	if err == nil {
		defer nfs.close()
		err = nfs.null(progNFS, vers3)
	}
	if err != nil {
		return "", fmt.Errorf("%w from the NFS server %s on TCP port %d: %w", ErrNoAnswer, r.Server, r.Port, err)
	}
	handle, err := mount(ctx, r)
	if err != nil {
		return "", err
	}
	text, err := nfs.readImage(handle)
	if err != nil {
		return "", fmt.Errorf("%s: %w", r, err)
	}
	var image struct {
		BuildID string `json:"build_id"`
	}
	if err := json.Unmarshal(text, &image); err != nil || image.BuildID == "" {
		return "", fmt.Errorf("%s: %w: its /%s is damaged", r, ErrNoImage, strings.Join(imageFile, "/"))
	}
	return image.BuildID, nil
}

// mount gets the root's handle.
func mount(ctx context.Context, r Root) ([]byte, error) {
	c, err := dialMount(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("%w from the MOUNT service of %s: %w", ErrNoAnswer, r.Server, err)
	}
	defer c.close()
	reply, err := c.call(progMount, vers3, procMnt, (&args{}).text(r.Path))
	if err != nil {
		return nil, fmt.Errorf("%s: MOUNT: %w", r, err)
	}
	switch status := reply.u32(); status {
	case 0:
	case statusPerm, statusAcces:
		return nil, fmt.Errorf("%s: %w", r, ErrRefused)
	case statusNoEnt, statusNotDir:
		return nil, fmt.Errorf("%s: %w", r, ErrNoPath)
	default:
		return nil, fmt.Errorf("%s: MOUNT answers with status %d (RFC 1813, mountstat3)", r, status)
	}
	handle := reply.opaque(64)
	if reply.bad || len(handle) == 0 {
		return nil, fmt.Errorf("%s: MOUNT: %w", r, errReply)
	}
	// The server's list of mounts should show nodes only.
	_, _ = c.call(progMount, vers3, procUmnt, (&args{}).text(r.Path))
	return handle, nil
}

// dialMount finds the MOUNT service as nodes do.
func dialMount(ctx context.Context, r Root) (*client, error) {
	port := r.MountPort
	if port == 0 {
		port = r.Port
	}
	c, err := dial(ctx, r.Server, port)
	if err == nil {
		if err = c.null(progMount, vers3); err == nil {
			return c, nil
		}
		c.close()
	}
	if r.MountPort != 0 {
		return nil, fmt.Errorf("port %d: %w", port, err)
	}
	at, pmErr := Portmap(ctx, r.Server, progMount, vers3)
	switch {
	case pmErr != nil:
		return nil, fmt.Errorf("not on NFS's port %d (%w), and no portmapper: %w", r.Port, err, pmErr)
	case at == 0:
		return nil, fmt.Errorf("not on NFS's port %d (%w), and its portmapper knows no MOUNT version 3 over TCP", r.Port, err)
	}
	if c, err = dial(ctx, r.Server, at); err != nil {
		return nil, err
	}
	if err := c.null(progMount, vers3); err != nil {
		c.close()
		return nil, fmt.Errorf("port %d: %w", at, err)
	}
	return c, nil
}

// Portmap asks the server's portmapper for the TCP port of an RPC program; 0
// when it knows none.
func Portmap(ctx context.Context, server netip.Addr, prog, vers uint32) (int, error) {
	pm, err := dial(ctx, server, portPortmap)
	if err != nil {
		return 0, err
	}
	defer pm.close()
	reply, err := pm.call(progPortmap, versPortmap, procGetPort, (&args{}).u32(prog, vers, ipprotoTCP, 0))
	if err != nil {
		return 0, err
	}
	at := reply.u32()
	if reply.bad || at > 65535 {
		return 0, errReply
	}
	return int(at), nil
}

// readImage reads image.json below the directory of the handle.
func (c *client) readImage(handle []byte) ([]byte, error) {
	for i, name := range imageFile {
		reply, err := c.call(progNFS, vers3, procLookup, (&args{}).opaque(handle).text(name))
		if err != nil {
			return nil, fmt.Errorf("LOOKUP: %w", err)
		}
		switch status := reply.u32(); {
		case status == statusNoEnt, status == statusNotDir:
			return nil, fmt.Errorf("%w: there is no /%s", ErrNoImage, strings.Join(imageFile[:i+1], "/"))
		case status == statusPerm, status == statusAcces:
			return nil, fmt.Errorf("%w: /%s can't be read", ErrRefused, strings.Join(imageFile[:i+1], "/"))
		case status != 0:
			return nil, fmt.Errorf("LOOKUP of %s: status %d (RFC 1813, nfsstat3)", name, status)
		}
		if handle = reply.opaque(64); reply.bad || len(handle) == 0 {
			return nil, errReply
		}
	}
	reply, err := c.call(progNFS, vers3, procRead, (&args{}).opaque(handle).u32(0, 0, maxImageFile))
	if err != nil {
		return nil, fmt.Errorf("READ: %w", err)
	}
	if status := reply.u32(); status != 0 {
		return nil, fmt.Errorf("%w: READ of image.json: status %d (RFC 1813, nfsstat3)", ErrRefused, status)
	}
	if reply.u32() != 0 { // post_op_attr
		reply.skip(84) // fattr3
	}
	reply.u32() // count
	reply.u32() // eof
	text := reply.opaque(maxImageFile)
	if reply.bad {
		return nil, errReply
	}
	return text, nil
}
