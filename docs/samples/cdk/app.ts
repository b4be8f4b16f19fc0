// A CDK app that deploys replicate-serverless as a nested stack, and reads its outputs.
//
// CfnStack, not CfnInclude: the template stays as it was released, with its SAM transform, rules and conditions, and
// CloudFormation expands it. CfnInclude would make its resources a part of this app, in which their logical ids, and so
// the table with your data, could be renamed by a refactoring.
//
// packaged.yaml is the template whose code is in S3 (`sam package`, see README.md); `cdk deploy` uploads it as an asset.

import { App, CfnOutput, CfnStack, Fn, Stack, Tags, type StackProps } from "aws-cdk-lib";
import { Asset } from "aws-cdk-lib/aws-s3-assets";
import type { Construct } from "constructs";

interface ReplicateProps extends StackProps {
  /** The path of the packaged template. */
  readonly template: string;
  /** The parameters of template.yaml. */
  readonly parameters: Record<string, string>;
}

class ReplicateStack extends Stack {
  readonly apiUrl: string;

  constructor(scope: Construct, id: string, props: ReplicateProps) {
    super(scope, id, props);
    const template = new Asset(this, "Template", { path: props.template });
    const replicate = new CfnStack(this, "Ai", { templateUrl: template.httpUrl, parameters: props.parameters });
    const output = (name: string) => replicate.getAtt(`Outputs.${name}`).toString();
    this.apiUrl = output("ApiUrl");
    for (const name of ["ApiUrl", "RequestsQueueUrl", "RequestsQueueArn", "EventBusName", "OutputsBucketName", "InputsBucketName"]) {
      new CfnOutput(this, name, { value: output(name) });
    }
    // For the option --stack of the commands of replicate-serverless: arn:…:stack/NAME/… holds the name.
    new CfnOutput(this, "StackName", { value: Fn.select(1, Fn.split("/", replicate.ref)) });
  }
}

const app = new App();
const context = (name: string): string => app.node.tryGetContext(name) ?? "";

// Short: the nested stack is named `Replicate-Ai…-…`, and recipes with triggers allow a stack's name 30 characters.
new ReplicateStack(app, "Replicate", {
  template: context("template") || "packaged.yaml",
  parameters: {
    ReplicateTokenSecretArn: context("tokenSecretArn"),
    AlarmTopicArn: context("alarmTopicArn"),
    PermissionsBoundaryArn: context("permissionsBoundaryArn"),
    RetentionDays: "30",
  },
});
Tags.of(app).add("service", "replicate-serverless"); // CloudFormation passes tags on to the nested stack's resources
