package cli

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"krgimage/pxe/head"
)

func (a *app) serveCommand() *cobra.Command {
	var link, server string
	var force bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Be the head node: boot the cluster's machines over the network",
		Long: `Serve DHCP, TFTP, HTTP and NFS on the boot network until interrupted.

Machines that boot from the network get their node id, boot loader, kernel and
stage 1, and mount the shared root from here. Ids that were handed out are kept
in the state directory. Run it as root, on a machine whose network interface
holds the address network.head.

The shared root is served by krgimage itself, or by this machine's kernel with
--nfs=kernel (Debian's nfs-kernel-server must be installed), or by the existing
server that nfsroot.server names; then no NFS is served here.

It refuses to start when another DHCP server answers on the link, because two
of them would hand out addresses against each other; --force serves all the
same.`,
		Example: `  ip addr add 10.77.0.254/24 dev eth1
  krgimage serve --interface eth1`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			c, err := a.load()
			if err != nil {
				return err
			}
			if link != "" {
				c.Network.Interface = link
			}
			if err := checkNFS(c, server); err != nil {
				return err
			}
			if err := requireRoot("serve"); err != nil {
				return err
			}
			state, err := a.state()
			if err != nil {
				return err
			}
			log, report := a.logger(slog.LevelInfo), a.reporter(false)
			im, err := checkedImage(state, report)
			if err != nil {
				return err
			}
			network, err := head.OpenLink(c.Network, log)
			if err != nil {
				return err
			}
			h, err := a.openHead(ctx, c, im, headOptions{
				command: "serve", state: state, network: network, nfs: server, force: force, log: log, report: report,
			})
			if err != nil {
				return err
			}
			defer h.Close()
			err = h.Run(ctx, func() {
				fmt.Fprintf(a.Out, "serving cluster %s on %s at %s: boot the machines from the network now\n", c.Name, network.Name(), c.Network.Head)
				fmt.Fprintln(a.Out, "'krgimage nodes' shows them; Ctrl-C stops")
			})
			if isStopped(ctx, err) {
				fmt.Fprintln(a.Out, "stopped")
				return nil
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&link, "interface", "i", "", "network `interface` of the boot network (default: network.interface)")
	cmd.Flags().StringVar(&server, "nfs", nfsBuiltin, "`server` of the shared root: builtin or kernel")
	cmd.Flags().BoolVar(&force, "force", false, "serve although another DHCP server answers on the link")
	return cmd
}
